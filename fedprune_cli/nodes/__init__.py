"""The same round on real nodes: what server and node say to each other, the work of a node, and the carriers of both."""
