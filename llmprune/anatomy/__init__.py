"""What a decoder is made of: blocks that can be recorded and replayed, and the weight matrices in them."""
