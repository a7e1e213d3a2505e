// Package serverurl reads the URL of a Cedarpost server for the Go client and the command
// line. Neither may show a password that somebody put into the URL.
package serverurl

import (
	"errors"
	"net/url"
	"strconv"
	"strings"
)

// Parse reads the URL of a server, like https://host:8080. Slashes at its end are left
// out. An error begins with a verb, as in "has a query …", and does not repeat the URL:
// see [Redacted].
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

// Redacted returns what an error may show of a URL. all is the list that it is in. If any
// of the list may have a password, nothing of it is shown: lists are split at commas, so a
// password with a comma in it is spread over two of them.
func Redacted(text string, all []string) string {
	if strings.Contains(strings.Join(all, ""), "@") {
		return "not shown, as it may have a password"
	}
	if i := strings.IndexAny(text, "?#"); i >= 0 {
		text = text[:i] + "…"
	}
	return strconv.Quote(text)
}
