"""The contrastive loss over the batches of all ranks of a process group.

One rule says what it computes: what one process computes from the ranks' embeddings, labels, keys and key
labels laid end to end in rank order. The entries of an :class:`~clce_ext.EmbeddingQueue` stay on their rank:
each rank's anchors see their own rank's queue.

Every rank first compares its own anchors with its own keys (with the symmetric kernel in self-contrast),
while the other ranks' keys are on their way, and then with those. Statistics of disjoint key sets merge
exactly, so the transport of the keys does not change the result.

    ranks.py        the process group: agreement before anything is exchanged, sums, rows of all ranks
    transports.py   how keys reach the other ranks, and how their gradients come home: gather and ring
    merge.py        statistics of disjoint key sets become those of their union
    loss.py         the loss and its gradients, made of these and of torch.ops.clce_ext
"""
