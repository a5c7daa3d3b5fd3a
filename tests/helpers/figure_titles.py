"""Read the titles of the images in a figure."""

from matplotlib.figure import Figure


def get_titles(figure: Figure) -> list[list[str]]:
    """Return the titles of the images in each row of a figure, "" for none."""
    columns = figure.axes[0].get_gridspec().ncols
    titles = [axes.get_title() if axes.images else "" for axes in figure.axes]
    return [titles[start : start + columns] for start in range(0, len(titles), columns)]
