"""What an adapter did to the model it was trained on."""
