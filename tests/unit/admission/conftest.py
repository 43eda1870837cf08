"""Property tests here draw whole fleets: on a busy machine that may take longer than hypothesis' 200 ms."""

from hypothesis import HealthCheck, settings

settings.register_profile("policies", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("policies")
