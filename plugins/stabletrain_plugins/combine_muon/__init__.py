"""Train hidden matrices with Muon and all other parameters with AdamW, as one optimizer."""
