package cedarpost

// Impatient simulates callers that ask one question and give up, one after another. The
// first asks now. Each call of next makes the present one give up and another one ask.
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
