"""A card that contains the name of its model folder, as before a push."""

OWN_CARD = """---
license: apache-2.0
tags:
- vit   # as it is
model-index:
- name: my-run
  results:
  - task:
      type: image-classification
    dataset:
      type: digits
      name: digits
    metrics:
    - type: accuracy
      value: 0.9
---

# my-run

Trained in my-run, against "my-run-2".

    classify = pipeline("image-classification", model="my-run", trust_remote_code=True)
    model = AutoModel.from_pretrained("my-run", trust_remote_code=True)
    other = AutoModel.from_pretrained("my-run-2"); base = AutoModel.from_pretrained("org/base")
    processor = AutoImageProcessor.from_pretrained(
        "my-run", trust_remote_code=True
    )
    vitcls finetune --model my-run --dataset my-run-2

# my-run
"""
