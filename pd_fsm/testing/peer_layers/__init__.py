"""Race search for other people's session layers: what has a manager, senders and receivers of SGLang's shape."""
