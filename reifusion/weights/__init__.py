"""Files with weights beside the checkpoint itself: LoRAs."""
