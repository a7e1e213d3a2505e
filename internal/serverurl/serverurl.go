// Package serverurl reads the URL of a Cedarpost server for the Go client and the command line. Its
// errors never show a password that is in the URL.
package serverurl

import (
	"errors"
	"net/url"
	"strconv"
	"strings"
)

// Parse reads the URL of a server, like https://host:8080, and removes slashes at its end. Its
// errors begin with a verb, as in "has a query …", and do not repeat the URL: see [Redacted].
func Parse(text string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.HasSuffix(u.Host, ":") {
		return nil, errors.New("is not a URL like https://host:8080")
	}
	if u.User != nil {
		return nil, errors.New("has a user or a password, which is not sent: a client sends an API key")
	}
	if u.RawQuery != "" || u.ForceQuery || strings.Contains(text, "#") {
		return nil, errors.New("has a query or a fragment, which is not sent")
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return nil, errors.New("has a port that is not between 1 and 65535")
		}
	}
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/")
	return u, nil
}

// Redacted returns what an error may show of a URL. all is the list that the URL is from. If any
// entry may have a password, no entry is shown: lists are split at commas, so two entries can
// each have a part of a password with a comma.
func Redacted(text string, all []string) string {
	if strings.Contains(strings.Join(all, ""), "@") {
		return "not shown, as it may have a password"
	}
	if i := strings.IndexAny(text, "?#"); i >= 0 {
		text = text[:i] + "…"
	}
	return strconv.Quote(text)
}
