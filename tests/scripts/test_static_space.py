"""The page of a static Space in Chromium, with a model of fixed outputs."""

from pathlib import Path

from huggingface_hub import ModelInfo
from PIL import Image
from playwright.sync_api import Browser, expect

from scripts.space.static_space import MODEL_FOLDER, TRANSFORMERS_JS_URL, write_static_space


MODEL = ModelInfo(id="ann/mine", sha="0" * 40)
# A black image of 8 x 8 pixels; of its 2 x 2 patches, the first receives the most attention.
LIBRARY = """
export const env = {};
export const softmax = (logits) => logits.map((logit) => logit / 10);
export const RawImage = { read: async () => null };
const pixel_values = { data: new Float32Array(3 * 8 * 8), dims: [1, 3, 8, 8] };
const settings = { do_normalize: false, image_mean: [0, 0, 0], image_std: [1, 1, 1] };
export const AutoImageProcessor = {
  from_pretrained: async () => Object.assign(async () => ({ pixel_values }), settings),
};
const cls_attention = { dims: [1, 1, 1, 2, 2], data: [0.9, 0, 0.05, 0.05] };
const outputs = { logits: { data: [2, 8] }, cls_attention };
const config = { id2label: { 0: "dusk", 1: "noon" } };
export const AutoModelForImageClassification = {
  from_pretrained: async () => ({ config, forward: async () => outputs }),
};
"""
HEADERS = {"content-type": "text/javascript", "access-control-allow-origin": "*"}
READ_CORNERS = """() => {
  const context = document.getElementById("map").getContext("2d");
  const read = ([x, y]) => Array.from(context.getImageData(x, y, 1, 1).data.slice(0, 3));
  return [[0, 0], [7, 0]].map(read);
}"""


def test_attention_is_a_heat_map_that_is_visible_on_a_dark_image(
    browser: Browser, tmp_path: Path
) -> None:
    space = tmp_path / "space"
    (space / MODEL_FOLDER).mkdir(parents=True)
    write_static_space(space, MODEL)
    Image.new("RGB", (8, 8)).save(tmp_path / "dark.png")
    with browser.new_page() as page:
        page.route(
            "http://space/*", lambda route: route.fulfill(path=space / Path(route.request.url).name)
        )
        page.route(TRANSFORMERS_JS_URL, lambda route: route.fulfill(body=LIBRARY, headers=HEADERS))
        page.goto("http://space/index.html")
        expect(page.get_by_role("heading", name="ann/mine")).to_be_visible()
        page.locator("#file").set_input_files(tmp_path / "dark.png")
        expect(page.locator("#labels tr").first).to_contain_text("noon80.0%")
        expect(page.locator("#number")).to_have_text("1 of 1")
        most, least = page.evaluate(READ_CORNERS)
    assert sum(most) > 250 > 150 > sum(least) > 0
    assert most[0] > most[2]
    assert least[2] > least[0]  # yellow and blue
