package cli

import (
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestHealthcheck: each answer has its exit code, and what failed is printed.
func TestHealthcheck(t *testing.T) {
	t.Setenv("HTTP_PROXY", "http://192.0.2.1:1") // no forward proxy is asked
	for _, tt := range []struct {
		name, report string
		status, code int
		stdout       string
		stderr       []string
	}{
		{name: "ready", report: "[+]etcd ok\nreadyz check passed\n", status: 200},
		{name: "a KMS is down", report: "[+]etcd ok\n[-]kms main: down\nreadyz check passed\n", status: 200, stdout: "[-]kms main: down\n"},
		{name: "draining", report: "[-]listeners failed\nreadyz check failed\n", status: 503, code: command.ExitFindings, stdout: "[-]listeners failed\n", stderr: []string{"not ready"}},
		{name: "another server", report: "<html>", status: 404, code: command.ExitFailure, stderr: []string{"404 Not Found", "hint: another server"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/readyz" {
					t.Errorf("asked for %s", r.URL)
				}
				w.WriteHeader(tt.status)
				_, _ = w.Write([]byte(tt.report))
			}))
			defer s.Close()
			address := strings.TrimPrefix(s.URL, "http://")
			_, port, _ := net.SplitHostPort(address)
			d := clitest.NewDir(t)
			for _, args := range [][]string{
				{"--address", address},
				{"--config", d.Config(t, `admin: {address: "127.0.0.1:0"}`, "admin: {address: '0.0.0.0:"+port+"'}")},
			} {
				r := execute(t, append([]string{"healthcheck"}, args...)...)
				r.want(t, tt.code, tt.stderr...)
				if r.stdout != tt.stdout {
					t.Errorf("%v prints %q, want %q", args, r.stdout, tt.stdout)
				}
			}
		})
	}
}

// TestHealthcheckNoAnswer: nothing there, nobody who answers, and nobody to ask.
func TestHealthcheckNoAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // the system accepts, and nobody answers
	if err != nil {
		t.Fatal(err)
	}
	silent := l.Addr().String()
	execute(t, "healthcheck", "--address", silent, "--timeout", "50ms").want(t, command.ExitFailure, "did not respond in time", "hint: ")
	_ = l.Close()
	execute(t, "healthcheck", "--address", silent).want(t, command.ExitFailure, "connection refused", "hint: ")
	d := clitest.NewDir(t)
	execute(t, "healthcheck", "--config", d.Config(t)).want(t, command.ExitFailure, "any free port", "hint: name the address")
	execute(t, "healthcheck", "--config", d.Config(t, `admin: {address: "127.0.0.1:0"}`, "")).want(t, command.ExitFailure, "no admin block", "hint: add `admin:")
	execute(t, "healthcheck", "--config", d.Path("none.yaml")).want(t, command.ExitFailure, "no such file", "hint: ")
	execute(t, "healthcheck", "--address", "nowhere").want(t, command.ExitUsage, "host:port")
	execute(t, "healthcheck", "--timeout", "0s").want(t, command.ExitUsage, "--timeout")
}
