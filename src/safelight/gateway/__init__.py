"""C1: the REST API. It takes images, hands them to workers over the broker, saves what comes back and answers."""
