"""Who owns which block, and how gradients and updates travel.

To read in this order:

    base            the three verbs: divide, collect, deliver
    local           one process: nothing travels
    assignment      who owns what: modelled costs in, owners out
    division        the blocks of all ranks, cut up by owner
    replicated      plain parameters and DDP: one all-gather
    wire            in which form updates travel
    pieces          which part of which block is held where
    orders          where the numbers of a message lie in memory
    lanes           parameters whose pieces travel together
    shipments       messages of several parts, in one all-to-all
    sharded         FSDP2 and HSDP: one all-to-all each way
    collectives     under the names that they have in every torch
    distribution    what a user may choose
    choice          which of these a parameter travels by
    agreement       do all ranks mean the same?
    gathering       all state on one rank, for checkpoints
    traffic         bytes that a step sends
"""
