package config

import (
	"errors"
	"fmt"
	"net"
	"os"

	"go.yaml.in/yaml/v3"
)

// ErrNoAdmin is returned by [AdminAddress] for a configuration without an admin block.
var ErrNoAdmin = errors.New("the configuration has no admin block")

// AdminAddress returns the host:port at which a process on the same machine reaches the admin
// server of the configuration at path. It reads nothing else of the file and validates nothing
// else: a proxy that runs keeps its settings while the file is being changed. An address that
// listens on every interface is returned as the loopback address of its family.
func AdminAddress(path string) (string, error) {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return "", fmt.Errorf("read configuration: %w", err)
	}
	var file struct {
		Admin yaml.Node `yaml:"admin"`
	}
	// The YAML library's messages quote what they read.
	if err := yaml.Unmarshal(data, &file); err != nil {
		return "", fmt.Errorf("read configuration: %s is not YAML", path)
	}
	if file.Admin.IsZero() {
		return "", ErrNoAdmin
	}
	admin := Admin{Address: "127.0.0.1:9379"} // the field's default
	if err := file.Admin.Decode(&admin); err != nil {
		return "", fmt.Errorf("read configuration: %s: admin is not a block with an address", path)
	}
	host, port, err := net.SplitHostPort(admin.Address)
	if err != nil {
		return "", fmt.Errorf("read configuration: %s: admin.address %q is not host:port", path, admin.Address)
	}
	if port == "0" {
		return "", fmt.Errorf("read configuration: %s: admin.address %q takes any free port, so it is not known here", path, admin.Address)
	}
	switch ip := net.ParseIP(host); {
	case host == "":
		host = "127.0.0.1"
	case ip != nil && ip.IsUnspecified() && ip.To4() != nil:
		host = "127.0.0.1"
	case ip != nil && ip.IsUnspecified():
		host = "::1"
	}
	return net.JoinHostPort(host, port), nil
}
