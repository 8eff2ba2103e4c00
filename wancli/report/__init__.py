"""What a render was and what it cost, from its manifests."""
