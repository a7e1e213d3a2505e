package impact

// SetMostPairs bounds the pairs that are tried.
func SetMostPairs(n int) { mostPairs = n }
