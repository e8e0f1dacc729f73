package provider

import (
	"errors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// KubernetesKeyFile is the form of the key files of kubernetes providers: keys as in an
// EncryptionConfiguration.
func KubernetesKeyFile(t kubelegacy.Type) keyfile.Form {
	return keyfile.Form{ID: "name", Sizes: t.KeySizes(), Empty: "etcd-kms-proxy config from-kubernetes makes the file from an EncryptionConfiguration"}
}

// ErrDecryptsOnly is returned where a provider of kind kubernetes cannot be used.
var ErrDecryptsOnly = errors.New("is of kind kubernetes, which only decrypts and has no key management service")

// newKubernetes reads the keys of k.
func newKubernetes(k *config.Kubernetes) (*Provider, error) {
	p := &Provider{Kind: "kubernetes " + k.Type}
	typ := kubelegacy.Type(k.Type)
	form := KubernetesKeyFile(typ)
	keys, _, err := keyfile.Read(k.KeyFile, form)
	c := kubelegacy.Config{Type: typ, Source: k.KeyFile}
	for _, key := range keys {
		defer clear(key.Secret)
		c.Keys = append(c.Keys, kubelegacy.Key{Name: key.ID, Secret: key.Secret})
	}
	if err == nil {
		p.Reader, err = kubelegacy.New(c)
	}
	if err != nil {
		return p, problem.In("kubernetes.keyFile", form.Empty, err)
	}
	return p, nil
}
