"""A Ray cluster for a search: the connection, the gauges that measure on the targets, the equipment of trainers."""
