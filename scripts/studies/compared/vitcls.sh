vitcls finetune --model "$ENCODER" --dataset "$PHOTOS/train" --output-dir "$OUTPUT/run"
vitcls evaluate --model "$OUTPUT/run" --dataset "$PHOTOS/test" --output "$OUTPUT/result.json"
