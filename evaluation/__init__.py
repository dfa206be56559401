"""What a trained model paints, measured against what the prompt asked for."""
