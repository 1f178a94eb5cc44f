"""The Ray Serve application: `deployments.app:build`."""
