"""Decisions as pure functions of frozen snapshots; standard library only."""
