package bootstrap

import (
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const pollInterval = 50 * time.Millisecond

// CheckHealth asks each NAME=URL once, or with --wait again and again until all answer with 200, and prints a line `NAME ok` or
// `NAME REASON` for each. The components serve their health with certificates of their own making, and tell nobody any secret: the
// certificates are not checked.
func CheckHealth(arguments []string) error {
	flags := flag.NewFlagSet("health", flag.ExitOnError)
	wait := flags.Duration("wait", 0, "how long to wait for all to be healthy")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	client := &http.Client{
		Timeout:   2 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true},
	}
	deadline := time.Now().Add(*wait)
	for {
		var lines []string
		isHealthy := true
		for _, endpoint := range flags.Args() {
			name, url, _ := strings.Cut(endpoint, "=")
			reason := "ok"
			if err := ask(client, url); err != nil {
				reason, isHealthy = err.Error(), false
			}
			lines = append(lines, name+" "+reason)
		}
		if isHealthy || !time.Now().Before(deadline) {
			fmt.Println(strings.Join(lines, "\n"))
			if !isHealthy {
				return errors.New("not all are healthy")
			}
			return nil
		}
		time.Sleep(pollInterval)
	}
}

func ask(client *http.Client, url string) error {
	response, err := client.Get(url)
	if err != nil {
		return errors.Unwrap(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
	if response.StatusCode != http.StatusOK {
		first, _, _ := strings.Cut(strings.TrimSpace(string(body)), "\n")
		return fmt.Errorf("%s: %s", response.Status, first)
	}
	return nil
}
