package cli

import (
	"errors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// kubernetesForm is what the key files of kubernetes providers hold: keys as an EncryptionConfiguration has them.
func kubernetesForm(t kubelegacy.Type) keyfile.Form {
	return keyfile.Form{ID: "name", Sizes: t.KeySizes(), Empty: "etcd-kms-proxy config from-kubernetes makes the file from an EncryptionConfiguration"}
}

var errReadsOnly = errors.New("is of kind kubernetes, which opens values and has no key management service")

// newKubernetes reads the keys of k.
func newKubernetes(k *config.Kubernetes) (*backend, error) {
	b := &backend{kind: "kubernetes " + k.Type}
	typ := kubelegacy.Type(k.Type)
	keys, _, err := keyfile.Read(k.KeyFile, kubernetesForm(typ))
	if err != nil {
		return b, err
	}
	c := kubelegacy.Config{Type: typ, Source: k.KeyFile}
	for _, key := range keys {
		defer clear(key.Secret)
		c.Keys = append(c.Keys, kubelegacy.Key{Name: key.ID, Secret: key.Secret})
	}
	reader, err := kubelegacy.New(c)
	if err != nil {
		return b, err
	}
	b.reader = reader
	return b, nil
}

// readWith adds to sc the provider called name. It reports whether there is one.
func (a *app) readWith(sc *keyring.SealerConfig, name string) bool {
	if reader := a.readers[name]; reader != nil {
		sc.Legacy = append(sc.Legacy, reader)
		return true
	}
	ring := a.ring(name)
	sc.Read = append(sc.Read, ring)
	return ring != nil
}
