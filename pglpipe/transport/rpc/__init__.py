"""Edges over torch.distributed.rpc."""
