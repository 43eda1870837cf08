"""What the plugin says about itself: SLO tracking, metrics, traces, profiler ranges. Knows no engine."""
