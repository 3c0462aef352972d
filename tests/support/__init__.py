"""What tests share: small models and data, a stand-in for the Hub, and ways to start programs."""
