"""What training costs, measured beside a plain model: `txfm bench train`."""
