"""Recipe + Site -> a run. The one place that knows every component; components know neither Recipe nor Site."""
