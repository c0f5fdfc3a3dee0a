"""Keep the moments of Adam, Lion and others in 8 bits, those of embeddings in 32 (bitsandbytes)."""
