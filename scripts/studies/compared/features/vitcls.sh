vitcls predict --model "$ENCODER" "$PHOTOS" --features cls --output "$OUTPUT.parquet" --mixed-precision "${PRECISION/fp32/no}"
