"""What several tests share: backends and servers, providers, faults, worker processes, generated programs."""
