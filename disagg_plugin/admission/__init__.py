"""Admission: who is served when not everybody can be, decided in front of the engine."""
