"""Who talks: keys, side channel, messages, peers, the offload call, and both roles of a scheduler process."""
