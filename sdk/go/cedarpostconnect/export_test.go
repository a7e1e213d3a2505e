package cedarpostconnect

import "time"

// Recheck sets how old a check may be when an answer is sent.
func (i *Interceptor) Recheck(d time.Duration) { i.recheck = d }
