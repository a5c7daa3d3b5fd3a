"""Access to the Hugging Face Hub that all folders share.

publishing/ writes cards, and pushes and verifies models.

    connection.py      error messages of the Hub, timeouts of a push, and silenced libraries
    loading.py         model name -> local folder, from the Hub or the cache; branch or tag -> commit; timm models
    local_paths.py     model and dataset names that are local paths
    model_code.py      whose code a model has, and which files differ
    model_files.py     names and hashes of the files in a model folder, and checks before they are read
    model_folder.py    what is in a model folder, and which of its results belong to its weights
    provenance.py      base model and license of a model

These files are not copied to the Hub.
"""
