"""Our codec inside LMCache's own server: what it keeps in its second tier takes a quarter of an fp32 cache."""
