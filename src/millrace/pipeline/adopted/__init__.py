"""Files of other formats, read where they lie: cut into blocks, hashed, and decoded block by block."""
