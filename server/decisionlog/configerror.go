package decisionlog

// A ConfigError is an error about the value of a field of the server's configuration.
type ConfigError struct {
	// Field is its name; that of a field of [Signing] begins with "Signing.".
	Field string
	// Err is what is wrong.
	Err error
}

func (e *ConfigError) Error() string { return e.Err.Error() }
func (e *ConfigError) Unwrap() error { return e.Err }
