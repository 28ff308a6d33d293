"""Header bytes in, tensors and ranges out; payload bytes in, arrays out."""
