package server

import "time"

// LogCare sets how soon a server looks after the log.
func LogCare(d time.Duration) func(*Config) { return func(c *Config) { c.logCare = d } }
