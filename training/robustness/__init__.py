"""How easily a retrieval model is fooled: norms, attacks, threats, certificates, and checks of all of them."""
