"""The guarantee under faults: `make chaos` runs a whole system on a chosen broker, breaks it, and counts.

`images.py` makes what is posted and knows what must come back; `proxy.py` stands between the parts and their broker;
`system.py` runs the parts, `servers.py` the brokers; `faults.py` breaks them; `clients.py` posts; `verdict.py` judges.
Everything goes through what a user has: HTTP, the command line, signals, and the broker's own tools.
"""
