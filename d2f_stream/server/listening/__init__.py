"""How a server listens: its port, the connections that come, and uvicorn behind them."""
