"""What is handed to the pipeline from outside, to draw otherwise with the same model."""
