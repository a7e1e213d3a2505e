package cedarpost

// Impatient stands for callers that ask a question and give up, one after the other. The
// first one asks it now; each call of the function makes it give up and the next one ask.
func Impatient(c *Client, check Check) (next func()) {
	key, err := appendKey(nil, &check)
	if err != nil {
		panic(err)
	}
	f, first := c.flights.join(string(key))
	if !first {
		panic("the question is under way")
	}
	return func() {
		c.flights.mu.Lock()
		defer c.flights.mu.Unlock()
		old := f
		f = &flight{done: make(chan struct{})}
		c.flights.under[string(key)] = f
		old.gaveUp = true
		close(old.done)
	}
}
