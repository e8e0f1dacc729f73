package envelope

import (
	"bytes"
	"errors"
	"strings"
)

// Root is the prefix of every value that Kubernetes or this proxy considers encrypted, in any
// scheme.
const Root = "k8s:enc:"

// scheme is the prefix of the values of this format.
const scheme = Root + "kms:v2:"

// Marker returns the prefix of the values of a provider, whose name must not be empty or contain a
// colon.
func Marker(provider string) (string, error) {
	if provider == "" {
		return "", errors.New("provider name is empty")
	}
	if strings.ContainsRune(provider, ':') {
		return "", errors.New("provider name holds a colon, which ends the name in every stored value")
	}
	return scheme + provider + ":", nil
}

// Split cuts a stored value into its provider and its EncryptedObject, both aliasing stored. ok is
// false for a value that does not begin with this format's marker.
func Split(stored []byte) (provider, object []byte, ok bool) {
	rest, ok := bytes.CutPrefix(stored, []byte(scheme))
	if !ok {
		return nil, nil, false
	}
	provider, object, ok = bytes.Cut(rest, []byte{':'})
	if !ok || len(provider) == 0 {
		return nil, nil, false
	}
	return provider, object, true
}
