"""Edges over torch.distributed.rpc, for those who ask for it."""
