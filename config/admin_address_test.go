package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestAdminAddress: the address is found in files that the proxy itself would refuse, and nothing
// of a file is quoted.
func TestAdminAddress(t *testing.T) {
	for _, tt := range []struct{ name, file, want, problem string }{
		{name: "as written", file: "admin: {address: 10.0.0.7:9000}\n", want: "10.0.0.7:9000"},
		{name: "default", file: "admin: {}\n", want: "127.0.0.1:9379"},
		{name: "any IPv4", file: "admin: {address: 0.0.0.0:9379}\n", want: "127.0.0.1:9379"},
		{name: "any", file: "admin: {address: ':9379'}\n", want: "127.0.0.1:9379"},
		{name: "any IPv6", file: "admin: {address: '[::]:9379'}\n", want: "[::1]:9379"},
		{name: "a file that is being edited", file: "admin: {address: localhost:1}\nruels: []\n", want: "localhost:1"},
		{name: "no block", file: "kind: ProxyConfiguration\n", problem: ErrNoAdmin.Error()},
		{name: "empty", problem: ErrNoAdmin.Error()},
		{name: "any port", file: "admin: {address: 127.0.0.1:0}\n", problem: "any free port"},
		{name: "no port", file: "admin: {address: localhost}\n", problem: "not host:port"},
		{name: "not a block", file: "admin: [1]\n", problem: "not a block"},
		{name: "not YAML", file: "secret-word: {\n", problem: "is not YAML"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "config.yaml")
			if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := AdminAddress(path)
			if got != tt.want || (err == nil) != (tt.problem == "") {
				t.Fatalf("got %q, %v; want %q, %q", got, err, tt.want, tt.problem)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.problem) || strings.Contains(err.Error(), "secret-word")) {
				t.Errorf("got %v, want %q", err, tt.problem)
			}
		})
	}
}
