"""What several test files share: data, stand-ins and small runs."""
