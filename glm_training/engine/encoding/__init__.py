"""What frozen encoders give, once for each picture and text: on disk by content, while the encoders sleep."""
