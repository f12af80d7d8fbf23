package bootstrap

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	plugin "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const registrationTimeout = 5 * time.Second

// devices is a device plugin without hardware: the kubelet and the scheduler allocate its devices as they would real ones, exclusively
// and by number, and a container learns which ones it got from the environment.
type devices struct {
	plugin.UnimplementedDevicePluginServer
	resource string
	ids      []string
}

// ServeDevices advertises --count devices named --resource to the kubelet until it is stopped. A kubelet that starts removes every
// plugin's socket and forgets the plugin: that removal is the sign to register again.
func ServeDevices(arguments []string) error {
	flags := flag.NewFlagSet("device-plugin", flag.ExitOnError)
	resource := flags.String("resource", "nvidia.com/gpu", "name of the extended resource")
	count := flags.Int("count", 4, "number of devices")
	folder := flags.String("folder", plugin.DevicePluginPath, "the kubelet's folder of device plugins")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	device := &devices{resource: *resource}
	for number := range *count {
		device.ids = append(device.ids, fmt.Sprintf("GPU-%d", number))
	}
	if err := os.MkdirAll(*folder, 0o750); err != nil {
		return err
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close()
	if err := watcher.Add(*folder); err != nil {
		return err
	}
	endpoint := strings.NewReplacer("/", "-", ".", "-").Replace(*resource) + ".sock"
	kubelet := filepath.Join(*folder, filepath.Base(plugin.KubeletSocket))
	for {
		if err := device.serve(watcher, kubelet, filepath.Join(*folder, endpoint)); err != nil {
			return err
		}
	}
}

// serve listens at `socket`, registers as soon as the kubelet listens, and returns when the kubelet has removed `socket`.
func (d *devices) serve(watcher *fsnotify.Watcher, kubelet, socket string) error {
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	plugin.RegisterDevicePluginServer(server, d)
	go server.Serve(listener)
	defer server.Stop()

	isRegistered := d.tryRegister(kubelet, socket)
	for {
		select {
		case event := <-watcher.Events:
			switch {
			case event.Name == socket && event.Has(fsnotify.Remove):
				if _, err := os.Stat(socket); os.IsNotExist(err) {
					return nil
				}
			case event.Name == kubelet && event.Has(fsnotify.Create):
				isRegistered = d.tryRegister(kubelet, socket)
			}
		case err := <-watcher.Errors:
			return err
		case <-time.After(time.Second):
			// The kubelet's socket exists a moment before the kubelet accepts.
			if !isRegistered {
				isRegistered = d.tryRegister(kubelet, socket)
			}
		}
	}
}

func (d *devices) tryRegister(kubelet, socket string) bool {
	if _, err := os.Stat(kubelet); err != nil {
		return false
	}
	connection, err := grpc.NewClient("unix://"+kubelet, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Printf("cannot reach the kubelet: %v", err)
		return false
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), registrationTimeout)
	defer cancel()
	_, err = plugin.NewRegistrationClient(connection).Register(ctx, &plugin.RegisterRequest{
		Version: plugin.Version, Endpoint: filepath.Base(socket), ResourceName: d.resource,
		Options: &plugin.DevicePluginOptions{},
	})
	if err != nil {
		log.Printf("the kubelet refused %s: %v", d.resource, err)
		return false
	}
	log.Printf("registered %d of %s", len(d.ids), d.resource)
	return true
}

// GetDevicePluginOptions says that nothing is to be done before a container starts.
func (d *devices) GetDevicePluginOptions(context.Context, *plugin.Empty) (*plugin.DevicePluginOptions, error) {
	return &plugin.DevicePluginOptions{}, nil
}

// ListAndWatch lists the devices once: they never change their health.
func (d *devices) ListAndWatch(_ *plugin.Empty, stream grpc.ServerStreamingServer[plugin.ListAndWatchResponse]) error {
	response := &plugin.ListAndWatchResponse{}
	for _, id := range d.ids {
		response.Devices = append(response.Devices, &plugin.Device{ID: id, Health: plugin.Healthy})
	}
	if err := stream.Send(response); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// Allocate tells each container its devices, in the variable that NVIDIA's own plugin sets.
func (d *devices) Allocate(_ context.Context, request *plugin.AllocateRequest) (*plugin.AllocateResponse, error) {
	response := &plugin.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &plugin.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}
